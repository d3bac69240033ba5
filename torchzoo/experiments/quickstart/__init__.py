"""The main job: a model composed of zoo parts, fine-tuned, streamed and timed on real digits."""
