"""Training of the embedded model: data, tokenizer, target, draft head. The engine never imports it."""
