"""Known circuits of language models as tests of a partition."""
