"""Files that ship with the package: a pretrained ViT-Ti/16 and CC-BY photographs (see CREDITS.md)."""
