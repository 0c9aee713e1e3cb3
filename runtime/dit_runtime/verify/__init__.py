"""An engine against the bundle's golden records, rung by rung, and what its verdict allows."""
