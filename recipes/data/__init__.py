"""What the recipes train on: images and text, read once, cut into micro-batches that are a function of their position."""
