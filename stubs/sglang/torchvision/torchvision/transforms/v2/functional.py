# The same names as in the first version.
from torchvision.transforms.functional import InterpolationMode, __getattr__
