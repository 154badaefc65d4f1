"""Models, tokenizers and heads: what every process that holds a network shares. Importing this imports no torch."""
