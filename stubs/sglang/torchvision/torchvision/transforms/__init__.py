from torchvision import __getattr__  # noqa: F401: any other name
from torchvision.transforms.functional import InterpolationMode  # noqa: F401
