package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

type lintCmd struct {
	Files []string `arg:"" optional:"" help:"Workflow files. Default: those of the repository that the current directory is in."`
	JSON  bool     `name:"json" help:"Print the diagnostics as JSON."`
}

// Help is kong's.
func (lintCmd) Help() string {
	return "The exit status is 0 when all files are good, 1 when one has errors, 2 when one cannot be read."
}

// Run is kong's.
func (c *lintCmd) Run(*env) error {
	diags, files, unread := c.check()
	if unread != nil && len(diags) == 0 {
		return &daemon.ExitError{Code: exitCouldNotRun, Err: unread}
	}
	var err error
	switch {
	case c.JSON:
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(diags)
	case len(diags) > 0:
		_, err = fmt.Print(diags)
	case files == 1:
		_, err = fmt.Println("1 workflow file, no problems")
	default:
		_, err = fmt.Printf("%d workflow files, no problems\n", files)
	}
	if err != nil {
		return &daemon.ExitError{Code: exitCouldNotRun, Err: problem("cannot print the diagnostics", err, "")}
	}
	if unread != nil {
		return &daemon.ExitError{Code: exitCouldNotRun, Err: unread}
	}
	if diags.HasErrors() {
		return &daemon.ExitError{Code: exitFailed}
	}
	return nil
}

// check parses the files, those that can be read also where others cannot; the
// diagnostics are never nil, for JSON.
func (c *lintCmd) check() (diags workflow.Diagnostics, files int, err error) {
	names := c.Files
	if len(names) == 0 {
		if names, err = repositoryFiles(); err != nil {
			return nil, 0, problem("cannot look for workflow files", err, "")
		}
		if len(names) == 0 {
			return nil, 0, problem(fmt.Sprintf("there is neither %s nor a file in %s", workflow.File, workflow.Dir), nil,
				"run this in a repository that has one, or name the files")
		}
	}
	diags = workflow.Diagnostics{}
	var unread []string
	var errs []error
	for _, f := range names {
		src, err := os.ReadFile(f)
		if err != nil {
			unread, errs = append(unread, f), append(errs, err)
			continue
		}
		_, d := workflow.Parse(f, src)
		diags = append(diags, d...)
	}
	if len(unread) > 0 {
		err = problem("cannot read "+strings.Join(unread, ", "), errors.Join(errs...), "")
	}
	return diags, len(names), err
}

// repositoryFiles are the workflow files here, or else those at the top of the
// repository that the current directory is in.
func repositoryFiles() ([]string, error) {
	out, err := workflowFiles(".")
	if err != nil || len(out) > 0 {
		return out, err
	}
	here, err := filepath.Abs(".")
	if err != nil {
		return nil, err
	}
	for dir, up := here, "."; ; dir, up = filepath.Dir(dir), filepath.Join(up, "..") {
		if _, err := os.Lstat(filepath.Join(dir, ".git")); err == nil {
			return workflowFiles(up)
		}
		if dir == filepath.Dir(dir) {
			return nil, nil
		}
	}
}

func workflowFiles(root string) ([]string, error) {
	var out []string
	one := filepath.Join(root, filepath.FromSlash(workflow.File))
	if _, err := os.Stat(one); err == nil {
		out = append(out, one)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(root, filepath.FromSlash(workflow.Dir)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		p := workflow.Dir + "/" + e.Name()
		if !e.IsDir() && workflow.IsFile(p) {
			out = append(out, filepath.Join(root, filepath.FromSlash(p)))
		}
	}
	slices.Sort(out)
	return out, nil
}
