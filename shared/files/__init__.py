"""Files written whole or not at all, and files read as data."""
