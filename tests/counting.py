"""A tokenizer whose tokens tell where they come from."""

BOS = 5


class Counting:
    """Numbers the letters of a text, so that a token tells its own position; with or without a BOS in front."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, verbose=True):
        front = [] if self.bos_token_id is None else [self.bos_token_id]
        return {"input_ids": front + list(range(1000, 1000 + len(text)))}
