"""From prompts to something to train on: prompts, collecting, batching, and building the experience."""
