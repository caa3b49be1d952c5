"""Facts of the curriculum: one sentence for each term, and a dozen tiny Python functions."""

from __future__ import annotations

# term with its article → what it is, in 8 to 18 words
EXPLANATIONS = {
    "an LLM": "An LLM is a large language model, a program that learns from text to predict the next token.",
    "a language model": "A language model is a program that says how likely each next word of a text is.",
    "a token": "A token is a small piece of text, such as a word or part of a word.",
    "a tokenizer": "A tokenizer is a program that cuts text into tokens and puts tokens back together.",
    "a neural network": "A neural network is a function with many adjustable numbers that are learned from examples.",
    "a transformer": "A transformer is a neural network that uses attention to let every token look at earlier ones.",
    "attention": "Attention is a way for each token to collect information from the other tokens.",
    "an embedding": "An embedding is a list of numbers that stands for a token inside a model.",
    "gradient descent": "Gradient descent is a method that lowers the loss by many small steps downhill.",
    "a gradient": "A gradient is the direction in which a function grows fastest, and how fast it grows.",
    "backpropagation": "Backpropagation is a method that finds the gradient of the loss for every parameter.",
    "a learning rate": "A learning rate is a number that sets how large each step of training is.",
    "a loss": "A loss is a number that tells how wrong the predictions of a model are.",
    "a parameter": "A parameter is a number inside a model that training can change.",
    "overfitting": "Overfitting is when a model remembers its training examples but does badly on new ones.",
    "a batch": "A batch is a small group of examples that a model learns from in one step.",
    "pretraining": "Pretraining is the first stage of training, where a model learns language from plain text.",
    "fine-tuning": "Fine-tuning is further training of a trained model on a smaller set of special examples.",
    "reinforcement learning": "Reinforcement learning is learning by trying things and doing more of what earns a reward.",
    "a reward": "A reward is a number that tells a model how good its output was.",
    "machine learning": "Machine learning is the art of making programs that improve by looking at data.",
    "a prompt": "A prompt is the text that you give to a language model to start from.",
    "a dataset": "A dataset is a collection of examples that a model can be trained or tested on.",
    "Python": "Python is a popular programming language that is known for being easy to read.",
    "a list": "A list is a Python object that keeps several values in order and can be changed.",
    "a dictionary": "A dictionary is a Python object that finds a value by its key.",
    "a tuple": "A tuple is a Python object that keeps several values in order and cannot be changed.",
    "a set": "A set is a collection in which every value is found at most once.",
    "a string": "A string is a piece of text that a program can work with.",
    "an integer": "An integer is a whole number, such as three, zero or minus seven.",
    "a variable": "A variable is a name that stands for a value in a program.",
    "a function": "A function is a named piece of code that takes inputs and gives back a result.",
    "a loop": "A loop is a piece of code that is run again and again.",
    "a class": "A class is a plan from which a program makes objects of one kind.",
    "a module": "A module is a file of Python code that other code can import.",
    "recursion": "Recursion is when a function calls itself to solve a smaller part of the problem.",
    "a bug": "A bug is a mistake in a program that makes it do the wrong thing.",
    "a compiler": "A compiler is a program that turns source code into code that a machine can run.",
    "an algorithm": "An algorithm is a list of exact steps that solves a problem.",
    "a computer": "A computer is a machine that follows instructions to work with data.",
    "a CPU": "A CPU is the part of a computer that carries out the instructions of programs.",
    "a GPU": "A GPU is a chip that does many simple calculations at the same time.",
    "a file": "A file is a piece of data with a name that is kept on a disk.",
    "a test": "A test is a piece of code that checks that other code does what it should.",
    "a prime number": "A prime number is a whole number above one that only one and itself divide.",
}

# The first phrasing is the plainest and is never held out.
EXPLAIN_PHRASINGS = (
    "What is {}?",
    "Explain {}.",
    "Define {}.",
    "Tell me what {} is.",
    "Explain what {} is.",
    "In one sentence, what is {}?",
    "Can you explain what {} is?",
)

# what the function does → its code
FUNCTIONS = {
    "adds two numbers": "def add(a, b):\n    return a + b",
    "subtracts two numbers": "def subtract(a, b):\n    return a - b",
    "multiplies two numbers": "def multiply(a, b):\n    return a * b",
    "squares a number": "def square(x):\n    return x * x",
    "doubles a number": "def double(x):\n    return 2 * x",
    "checks whether a number is even": "def is_even(n):\n    return n % 2 == 0",
    "checks whether a number is odd": "def is_odd(n):\n    return n % 2 == 1",
    "gives the larger of two numbers": "def larger(a, b):\n    return max(a, b)",
    "gives the smaller of two numbers": "def smaller(a, b):\n    return min(a, b)",
    "reverses a string": "def reverse(text):\n    return text[::-1]",
    "gives the first item of a list": "def first(items):\n    return items[0]",
    "gives the last item of a list": "def last(items):\n    return items[-1]",
    "counts the items of a list": "def count(items):\n    return len(items)",
    "adds up a list of numbers": "def total(numbers):\n    return sum(numbers)",
    "says hello": 'def hello():\n    print("Hello!")',
}

CODE_PHRASINGS = (
    "Write a Python function that {}.",
    "Write a function in Python that {}.",
    "Show me a Python function that {}.",
    "I need a Python function that {}.",
)

GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hi!": "Hi! What can I do for you?",
    "Hi there!": "Hi! What can I do for you?",
    "Good morning!": "Good morning! How can I help you?",
    "Good evening!": "Good evening! How can I help you?",
    "Thank you!": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye!": "Goodbye! Have a nice day!",
    "Bye!": "Goodbye! Have a nice day!",
    "How are you?": "I am well, thank you. How can I help you?",
    "Who are you?": "I am a small language model.",
    "What are you?": "I am a small language model.",
    "What can you do?": "I can answer short questions, do small sums and write tiny Python functions.",
}
