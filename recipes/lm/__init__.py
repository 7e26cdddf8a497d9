"""Training a language model on text: the run that both recipes make, validation and samples, models of ``transformers``."""
