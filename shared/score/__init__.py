"""How strongly a prompt steers the prediction, and what ordinary prompts do."""
