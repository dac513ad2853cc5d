"""A `Qwen2_5_VLProcessor` for images alone."""

from transformers import Qwen2_5_VLProcessor


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without its processor of videos, the only part that needs torchvision.

    The folder names the class that it derives from, so `AutoProcessor` restores that one where torchvision is
    installed; both give the same tokens, and the same pixels up to the rounding of a resize.
    What this class saves is read by it alone (`ImageOnlyProcessor.from_pretrained`), or by `hf-compress eval`;
    `AutoProcessor` does not know the class and returns the tokenizer.

    Args:
        image_processor, tokenizer, chat_template: as of `Qwen2_5_VLProcessor`.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        # kwargs: what a folder holds beside, such as the settings for videos
        for mark in ("image", "video"):  # tokenizers of published checkpoints do not name them
            token = getattr(tokenizer, f"{mark}_token", f"<|{mark}_pad|>")
            setattr(self, f"{mark}_token", token)
            setattr(self, f"{mark}_token_id", tokenizer.convert_tokens_to_ids(token))
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)
