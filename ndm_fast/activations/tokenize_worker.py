"""A process that tokenizes: run as a script, so that it imports neither torch nor this package.

Reads pickled frames from stdin: first a tokenizer in its JSON form, then lists of texts. Answers each list on
stdout with its token ids.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any, BinaryIO


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(pickle.load(requests))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    while True:
        try:
            texts = pickle.load(requests)
        except EOFError:
            return
        encodings: list[Any] = tokenizer.encode_batch(texts, add_special_tokens=False)
        pickle.dump([encoding.ids for encoding in encodings], answers)
        answers.flush()


if __name__ == "__main__":
    # Python looks for modules beside a script first; those of this package are none of their own.
    sys.path[:] = [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    _serve(sys.stdin.buffer, sys.stdout.buffer)
