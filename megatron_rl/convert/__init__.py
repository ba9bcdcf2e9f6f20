"""Between Hugging Face folders and Megatron checkpoints, file by file, in several processes and little memory."""
