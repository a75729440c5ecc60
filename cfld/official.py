"""Where each tensor of the authors' released checkpoints belongs in our model."""

import re

# The numbers in our names are those of the authors unless a function below changes them.
RENAMES = (
    (r"learnable_vector", "learnable_vector"),
    (r"backbone\.((?:patch_embed|layers\.\d+\.blocks)\..+)", r"source_encoder.swin.\1"),
    (r"pose_encoder\.(.+)", r"pose_adapter.\1"),
    (r"decoder\.query_feat", "prompt_decoder.queries"),
    (r"decoder\.pos_embed", "prompt_decoder.query_positions"),
    (r"decoder\.kv_pos_embed", "prompt_decoder.feature_positions"),
    # Their numbers follow diffusers' block, whose order D turns round: attention 2 is the first.
    (r"decoder\.(blocks\.\d+)\.attn1\.(.+)", r"prompt_decoder.\1.self_attention.\2"),
    (r"decoder\.(blocks\.\d+)\.attn2\.(.+)", r"prompt_decoder.\1.cross_attention.\2"),
    (r"decoder\.(blocks\.\d+)\.norm1\.(.+)", r"prompt_decoder.\1.self_norm.\2"),
    (r"decoder\.(blocks\.\d+)\.norm2\.(.+)", r"prompt_decoder.\1.cross_norm.\2"),
    (r"decoder\.(blocks\.\d+)\.norm3\.(.+)", r"prompt_decoder.\1.feed_forward_norm.\2"),
    (r"decoder\.(blocks\.\d+)\.ff\.(.+)", r"prompt_decoder.\1.feed_forward.\2"),
    (r"model\.(.+)", r"unet.\1"),
)
REBUILT = re.compile(r"backbone\..+\.(relative_position_index|attn_mask)")
DOWNSAMPLE = re.compile(r"backbone\.layers\.(\d+)\.downsample\.(.+)")
BRANCH = re.compile(r"appearance_encoder\.(zero_conv_ins|zero_conv_outs|blocks)\.(\d+)\.(.+)")
BRANCH_PARTS = {"zero_conv_ins": "conv_in", "zero_conv_outs": "conv_out", "blocks": "blocks"}


def our_name(official: str, num_branches: int) -> str | None:
    """Name in our `CFLD` of a tensor in `pytorch_model.bin` or `pytorch_model_1.bin`.

    None for buffers that are rebuilt from the sizes. The authors number the branches of A from
    the UNet's last layer to its first, we from the first to the last of all `num_branches`.

    Raises:
        KeyError: If the authors' code has no tensor of this name.
    """
    if REBUILT.fullmatch(official):
        return None
    if match := DOWNSAMPLE.fullmatch(official):  # timm merges patches before a stage, not after
        return f"source_encoder.swin.layers.{int(match[1]) + 1}.downsample.{match[2]}"
    if match := BRANCH.fullmatch(official):
        branch = num_branches - 1 - int(match[2])
        return f"appearance.branches.{branch}.{BRANCH_PARTS[match[1]]}.{match[3]}"
    for pattern, ours in RENAMES:
        if match := re.fullmatch(pattern, official):
            return match.expand(ours)
    raise KeyError(official)
