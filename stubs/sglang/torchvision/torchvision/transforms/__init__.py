# This one, and any other name.
from torchvision import __getattr__
from torchvision.transforms.functional import InterpolationMode
