"""What the commands have in common: their options, and how they answer."""
