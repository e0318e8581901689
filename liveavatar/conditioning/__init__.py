"""From what people give (speech, a portrait, a prompt) to what the model eats."""
