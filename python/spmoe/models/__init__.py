"""transformers models: a target without its experts, a draft, their tokenizers."""
