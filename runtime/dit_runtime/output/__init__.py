"""What sampling leaves behind: images with the record of what made them."""
