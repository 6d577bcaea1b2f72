"""Names without the things: text models import torchvision and use nothing of it."""


class Absent:
    """Anything that torchvision has. Using it is an error."""

    def __init__(self, *args, **kwargs):
        raise RuntimeError("torchvision is only a stand-in here: models with images need the real one")


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Absent,), {})
