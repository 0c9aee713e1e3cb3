"""What all other folders use: errors, files, progress, and facts about the machine."""
