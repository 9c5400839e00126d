"""Pictures to train and test on: labelled packs, folders, faces."""
