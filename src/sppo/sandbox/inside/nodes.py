"""Linked structures (`ListNode`, `TreeNode`, `Node`) as plain data, and the lists by which problem sets write them
down.

Between the two jails of `asserts` a structure travels as the attributes of its nodes, cycles and shared nodes included,
and becomes one of the other side's own class. In `calls` a list becomes a structure where the function's annotation
asks for one.
"""

from codec import ITEMS, Opaque

KINDS = ("ListNode", "TreeNode", "Node")


def is_node(value):
    return type(value).__name__ in KINDS and hasattr(value, "__dict__")


def encode_graph(root, plain):
    """The tree of a structure: for each node its kind and attributes; `["n", i]` is a link to node i.

    `plain` encodes the rest.
    """
    nodes, at = [root], {id(root): 0}

    def part(value):
        if is_node(value):
            if id(value) not in at:
                if len(nodes) == ITEMS:
                    raise Opaque("more than %d nodes" % ITEMS)
                at[id(value)] = len(nodes)
                nodes.append(value)
            return ["n", at[id(value)]]
        return ["l", [part(x) for x in value]] if isinstance(value, (list, tuple)) else plain(value)

    out = []
    for node in nodes:  # which grows meanwhile
        out.append([type(node).__name__, [[name, part(value)] for name, value in vars(node).items()]])
    return ["N", out]


def decode_graph(tree, classes, plain):
    """The root of a structure, of the `classes` here by kind. Raises Opaque for a kind that is not among them."""
    made = []
    for kind, _ in tree:
        if kind not in KINDS or not isinstance(classes.get(kind), type):
            raise Opaque("a node of an unknown kind")
        made.append(object.__new__(classes[kind]))

    def part(value):
        if isinstance(value, list) and value[:1] == ["n"]:
            return made[value[1]]
        return [part(x) for x in value[1]] if isinstance(value, list) and value[:1] == ["l"] else plain(value)

    for node, (_, attributes) in zip(made, tree):
        for name, value in attributes:
            if not name.isidentifier() or name.startswith("__"):
                raise Opaque("an attribute of no plain name")
            setattr(node, name, part(value))
    return made[0]


def built(value, annotation, names):
    """An argument as the function's annotation asks for it: a list as linked nodes, or a list of such lists."""
    text = str(annotation)
    kind = next((k for k in ("ListNode", "TreeNode") if k in text and isinstance(names.get(k), type)), None)
    if kind is None or not (value is None or isinstance(value, list)):
        return value
    build = list_from if kind == "ListNode" else tree_from
    if ("List[" in text or "list[" in text) and value is not None:
        return [build(names[kind], x) for x in value]
    return build(names[kind], value)


def written(value, annotation=""):
    """A value as problem sets write it: nodes as a list, without the absent children at a tree's end; lists of them
    too."""
    kind = type(value).__name__
    if value is None and ("ListNode" in str(annotation) or "TreeNode" in str(annotation)):
        return []
    if is_node(value) and kind == "ListNode":
        out = []
        while value is not None and len(out) < ITEMS:
            out.append(value.val)
            value = value.next
        return out
    if is_node(value) and kind == "TreeNode":
        out, row = [], [value]
        for node in row:  # which grows meanwhile
            out.append(None if node is None else node.val)
            if node is not None and len(row) < ITEMS:
                row += [node.left, node.right]
        while out and out[-1] is None:
            out.pop()
        return out
    if type(value) is list and any(map(is_node, value)):
        return [written(x, "ListNode") if is_node(x) or x is None else x for x in value]
    return value


def list_from(kind, values):
    root = None
    for value in reversed(values or []):
        node = kind(value)
        node.next, root = root, node
    return root


def tree_from(kind, values):
    """A tree from its values level by level, None where a child is absent."""
    if not values:
        return None
    nodes = [None if v is None else kind(v) for v in values]
    children = iter(nodes[1:])
    for node in nodes:
        if node is not None:
            node.left, node.right = next(children, None), next(children, None)
    return nodes[0]
