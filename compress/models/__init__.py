"""Models: loading of diffusers pipelines and vision-language models, and those that ship."""
