from interop import model_card  # temporary
