"""Other engines that speak OpenAI's API (vLLM, SGLang, llama-server, Evermini): how they are named and asked."""
