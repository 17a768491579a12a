"""The smallest network with all parts of ours, as the beginning of a recipe's YAML."""

NETWORK = """
network:
  base_channels: 32
  channel_multipliers: [1]
  num_res_blocks: 1
  patch_size: 4
  head_channels: 32
  reference_channels: 32
"""
