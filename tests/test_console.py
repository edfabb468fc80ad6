from mima import console


def test_text_is_printed_as_it_is(capsys):
    console.stdout().print("out [red] is a :cat:")
    assert capsys.readouterr().out == "out [red] is a :cat:\n"


def test_a_command_can_be_pasted_into_a_shell():
    assert console.command("report", "a 'b") == """mima report 'a '"'"'b'"""
