"""Methods of the prompt stage: which text enters the language model."""
