"""What a recipe needs and how long it takes, from sizes alone: no torch, no device, no weights."""
