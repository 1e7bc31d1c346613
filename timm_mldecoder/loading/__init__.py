"""From a dataset to batches on the device: images, order, mixing, patches."""
