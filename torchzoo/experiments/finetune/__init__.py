"""Fine-tuning a model that people have, with and without layers of the zoo in it."""
