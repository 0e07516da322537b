package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"Shell to complete for: ${enum}."`
}

// Help is kong's.
func (completionCmd) Help() string {
	return `Prints a script for the shell, to be read at its start:

  bash: source <(solstice completion bash)
  zsh:  source <(solstice completion zsh), after compinit
  fish: solstice completion fish | source`
}

// The scripts ask this program what fits, so that they never are of another
// version. Where nothing fits the shell completes file names.
var completions = map[string]string{
	"bash": `_solstice() {
  local IFS=$'\n' cur=${COMP_WORDS[COMP_CWORD]} line=("${COMP_WORDS[@]:1:COMP_CWORD}")
  # Readline takes = for the end of a word.
  if [[ $cur == = ]]; then cur=; fi
  COMPREPLY=($(compgen -W "$("${COMP_WORDS[0]}" __complete -- "${line[@]}" 2>/dev/null | cut -f1)" -- "$cur"))
}
complete -o default -F _solstice solstice
`,
	"zsh": `_solstice() {
  local -a found
  local text
  for text in ${(f)"$("${words[1]}" __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)"}; do
    found+=("${${text%%$'\t'*}//:/\\:}:${text#*$'\t'}")
  done
  if (( $#found )); then _describe solstice found; else _files; fi
}
compdef _solstice solstice
`,
	"fish": `function __solstice_complete
  set -l words (commandline -opc) (commandline -ct)
  $words[1] __complete -- $words[2..-1] 2>/dev/null
end
complete -c solstice -a '(__solstice_complete)'
`,
}

// Run is kong's.
func (c *completionCmd) Run() error {
	_, err := fmt.Print(completions[c.Shell])
	return printed(err)
}

type completeCmd struct {
	Words []string `arg:"" optional:"" passthrough:"" help:"The words after the program's name, the last one to be completed."`
}

// Run is kong's. It prints what fits, each with a tab and its help.
func (c *completeCmd) Run(ctx *kong.Context) error {
	words := c.Words
	if len(words) > 0 && words[0] == "--" {
		words = words[1:]
	}
	for _, s := range complete(ctx.Model.Node, words) {
		if _, err := fmt.Printf("%s\t%s\n", s.word, s.help); err != nil {
			return printed(err)
		}
	}
	return nil
}

// suggestion is what a word may become.
type suggestion struct{ word, help string }

// complete says what the last word may become, after those before it.
func complete(node *kong.Node, line []string) []suggestion {
	if len(line) == 0 {
		line = []string{""}
	}
	last := line[len(line)-1]
	var pending *kong.Flag // a flag whose value is next
	positional := 0
	for _, w := range line[:len(line)-1] {
		switch {
		case pending != nil && w == "=": // as bash cuts --flag=value
		case pending != nil:
			pending = nil
		case strings.HasPrefix(w, "-"):
			if f := flagNamed(node, w); f != nil && !f.IsBool() && !f.IsCounter() && !strings.Contains(w, "=") {
				pending = f
			}
		default:
			if child := childNamed(node, w); child != nil {
				node, positional = child, 0
			} else {
				positional++
			}
		}
	}
	prefix := last
	if name, value, ok := strings.Cut(last, "="); ok && pending == nil && strings.HasPrefix(name, "--") {
		if f := flagNamed(node, name); f != nil {
			return fitting(values(f.Value, name+"="), name+"="+value)
		}
		return nil
	}
	var all []suggestion
	switch {
	case pending != nil && last == "=":
		all, prefix = values(pending.Value, ""), ""
	case pending != nil:
		all = values(pending.Value, "")
	case strings.HasPrefix(last, "-"):
		for _, group := range node.AllFlags(true) {
			for _, f := range group {
				all = append(all, suggestion{"--" + f.Name, brief(f.Help)})
			}
		}
	default:
		for _, child := range node.Children {
			if !child.Hidden {
				all = append(all, suggestion{child.Name, brief(child.Help)})
			}
		}
		if positional < len(node.Positional) {
			all = append(all, values(node.Positional[positional], "")...)
		}
	}
	return fitting(all, prefix)
}

func fitting(all []suggestion, prefix string) []suggestion {
	all = slices.DeleteFunc(all, func(s suggestion) bool { return !strings.HasPrefix(s.word, prefix) })
	slices.SortFunc(all, func(a, b suggestion) int { return strings.Compare(a.word, b.word) })
	return all
}

// values are those that a flag or argument may have, if they are few.
func values(v *kong.Value, before string) []suggestion {
	var out []suggestion
	if v.Enum != "" {
		for _, w := range v.EnumSlice() {
			out = append(out, suggestion{before + w, ""})
		}
	}
	return out
}

// brief is the first sentence of a help.
func brief(help string) string {
	first, _, _ := strings.Cut(help, ". ")
	return strings.TrimSuffix(strings.ReplaceAll(first, "\n", " "), ".")
}

func childNamed(n *kong.Node, name string) *kong.Node {
	for _, c := range n.Children {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func flagNamed(n *kong.Node, arg string) *kong.Flag {
	name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	for _, group := range n.AllFlags(false) {
		for _, f := range group {
			if f.Name == name || !strings.HasPrefix(arg, "--") && f.Short != 0 && strings.HasSuffix(name, string(f.Short)) {
				return f
			}
		}
	}
	return nil
}
