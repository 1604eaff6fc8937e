"""Which images are copies of others: a rule that needs nothing but the images."""
