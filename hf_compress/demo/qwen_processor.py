"""A `Qwen2_5_VLProcessor` for images alone, and one for clips, neither of which needs torchvision."""

import torch
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


class ClipProcessor(ImageOnlyProcessor):
    """As `ImageOnlyProcessor`, and it takes clips: `processor(videos=[frames, ...], text=...)`, see `FrameReader`.

    Frames are two a second, so that the moment that two of them make is a second.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template, **kwargs)
        self.video_processor = FrameReader(image_processor)

    def _process_videos(self, videos, **kwargs):
        inputs = self.video_processor(videos)
        marks = [self.replace_video_token(inputs, i) for i in range(len(videos))]
        return inputs | {"second_per_grid_ts": torch.ones(len(videos))}, marks


class FrameReader:
    """What a processor of Qwen2.5-VL has for videos, of lists of frames: each is processed as an image would be.

    Two after each other become one moment; of an odd number the last one counts twice.

    Args:
        images: the image processor, whose settings serve for frames.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, images):
        self.images = images
        self.patch_size, self.merge_size = images.patch_size, images.merge_size
        self.temporal_patch_size = images.temporal_patch_size

    def __call__(self, videos, **kwargs):
        """dict of "pixel_values_videos" (rows of patches) and "video_grid_thw" (videos, 3), tensors.

        Raises:
            ValueError: the frames of a video are of different sizes.
        """
        pixels, grids = [], []
        for frames in videos:
            found = self.images(list(frames), return_tensors="pt")
            sizes = {(h, w) for _, h, w in found["image_grid_thw"].tolist()}
            if len(sizes) > 1:
                raise ValueError(f"videos: the frames of one have {len(sizes)} sizes; resize them to one")
            ((h, w),) = sizes
            patches = found["pixel_values"].view(len(frames), h * w, -1, self.temporal_patch_size, self.patch_size**2)
            if len(frames) % 2:
                patches = torch.cat([patches, patches[-1:]])
            pairs = torch.stack([patches[0::2, :, :, 0], patches[1::2, :, :, 1]], 3)
            pixels.append(pairs.reshape(len(pairs) * h * w, -1))
            grids.append([len(pairs), h, w])
        return {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
