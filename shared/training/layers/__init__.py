"""A concept's subspaces in what single layers read, and its regions in images."""
