"""The Gradio page of a class-conditional pipeline."""
