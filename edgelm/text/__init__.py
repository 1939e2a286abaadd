"""Text in and out: tokenizers, chat templates, incremental decoding, stop strings.

Knows nothing of weights, backends or generation.
"""
