"""How each family of pipelines reads prompts and calls its network, one file each."""
