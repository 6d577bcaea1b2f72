from torchvision.transforms.functional import InterpolationMode, __getattr__  # noqa: F401
