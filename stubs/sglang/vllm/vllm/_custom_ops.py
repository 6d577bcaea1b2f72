def rotary_embedding(*args, **kwargs):
    raise RuntimeError("vLLM is only a stand-in here")
