"""How a question is put to the policy, everywhere: in scoring, training, rollouts and evaluation."""


def prompt_ids(tokenizer, question: str) -> list[int]:
    """Ids of the question in the model's chat template; of a base model without one, of the question and a new line."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(question + "\n")
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
