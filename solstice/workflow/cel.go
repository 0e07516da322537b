package workflow

import (
	"fmt"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/ext"
	"cel.dev/cel-go/parser"
)

// Bounds on one expression.
const (
	maxExpression = 4096    // characters
	maxExprDepth  = 48      // of nesting
	maxExprNodes  = 4096    // after macro expansion
	maxExprCost   = 500_000 // CEL's cost units, roughly elementary operations
)

// Variables that workflows cannot name, since @ is not in an identifier.
const (
	statusVar = "@status" // the job's status, behind success() and its sisters
	spellVar  = "@spell"  // contexts with numbers as text, behind string()
)

// statusFuncs are the functions that say how things went so far.
var statusFuncs = []string{"success", "failure", "cancelled", "always"}

// celEnv is the language of expressions: CEL's standard library and the string
// functions of its extension library. event, inputs, matrix, needs and steps
// are maps; env maps to strings; ref, sha and repo are strings.
var celEnv = sync.OnceValue(func() *cel.Env {
	dyn, str := cel.MapType(cel.StringType, cel.DynType), cel.StringType
	env, err := cel.NewCustomEnv(
		cel.StdLib(),
		ext.Strings(),
		cel.ClearMacros(),
		cel.Macros(append(statusMacros(),
			cel.GlobalMacro("has", 1, expandHas),
			cel.GlobalMacro("string", 1, expandString),
			cel.AllMacro, cel.ExistsMacro, cel.ExistsOneMacro, cel.MapMacro, cel.MapFilterMacro, cel.FilterMacro)...),
		cel.EnableIdentifierEscapeSyntax(),
		cel.CrossTypeNumericComparisons(true),
		cel.ParserExpressionSizeLimit(maxExpression),
		cel.ParserRecursionLimit(maxExprDepth),
		cel.ParserErrorRecoveryLimit(4),
		cel.ExpressionNodeLimit(maxExprNodes),
		cel.Variable("event", dyn),
		cel.Variable("inputs", dyn),
		cel.Variable("matrix", dyn),
		cel.Variable("needs", dyn),
		cel.Variable("steps", dyn),
		cel.Variable("env", cel.MapType(str, str)),
		cel.Variable("ref", str),
		cel.Variable("sha", str),
		cel.Variable("repo", str),
		cel.Variable(statusVar, str),
		cel.Variable(spellVar, dyn),
	)
	if err != nil {
		panic(fmt.Sprintf("workflow: the expression environment: %v", err)) // a constant: it works or no test passes
	}
	return env
})

// statusMacros make comparisons with the hidden variable of the status
// functions, so that programs stay free of state.
func statusMacros() []cel.Macro {
	var out []cel.Macro
	for _, name := range statusFuncs {
		out = append(out, cel.GlobalMacro(name, 0, func(h parser.ExprHelper, _ ast.Expr, _ []ast.Expr) (ast.Expr, *common.Error) {
			op, value := operators.Equals, name
			if name == "always" {
				op, value = operators.NotEquals, ""
			}
			return h.NewCall(op, h.NewIdent(statusVar), h.NewLiteral(types.String(value))), nil
		}))
	}
	return out
}

// expandHas turns has(a.b) into 'b' in a. That is the same for maps, and right
// for those whose missing entries read as empty.
func expandHas(h parser.ExprHelper, _ ast.Expr, args []ast.Expr) (ast.Expr, *common.Error) {
	if args[0].Kind() != ast.SelectKind {
		return nil, h.NewError(args[0].ID(), "has() takes a field, such as has(event.number)")
	}
	s := args[0].AsSelect()
	return h.NewCall(operators.In, h.NewLiteral(types.String(s.FieldName())), s.Operand()), nil
}

// expandString makes string(matrix.go) keep the spelling of a number: 1.20.
func expandString(h parser.ExprHelper, _ ast.Expr, args []ast.Expr) (ast.Expr, *common.Error) {
	path, ok := constPath(args[0])
	if !ok || len(path) < 2 || !spelled(path[0]) {
		return nil, nil // no expansion: CEL's own string()
	}
	e := h.NewIdent(spellVar)
	for _, name := range path {
		e = h.NewSelect(e, name)
	}
	return h.NewCall("string", e), nil
}

func spelled(root string) bool { return root == "matrix" || root == "inputs" || root == "event" }

// constPath is the names of a.b['c'] in order, where all are constant.
func constPath(e ast.Expr) ([]string, bool) {
	var rev []string
	for {
		switch e.Kind() {
		case ast.IdentKind:
			rev = append(rev, e.AsIdent())
			for i, j := 0, len(rev)-1; i < j; i, j = i+1, j-1 {
				rev[i], rev[j] = rev[j], rev[i]
			}
			return rev, true
		case ast.SelectKind:
			rev = append(rev, e.AsSelect().FieldName())
			e = e.AsSelect().Operand()
		case ast.CallKind:
			c := e.AsCall()
			if c.FunctionName() != operators.Index || len(c.Args()) != 2 || c.Args()[1].Kind() != ast.LiteralKind {
				return nil, false
			}
			s, ok := c.Args()[1].AsLiteral().(types.String)
			if !ok {
				return nil, false
			}
			rev = append(rev, string(s))
			e = c.Args()[0]
		default:
			return nil, false
		}
	}
}

// lenientMap is a map whose missing entries read as a default.
type lenientMap struct {
	traits.Mapper
	missing ref.Val
}

func lenient(v any, missing ref.Val) ref.Val {
	m, ok := celEnv().CELTypeAdapter().NativeToValue(v).(traits.Mapper)
	if !ok {
		return types.NewErr("not a map")
	}
	return lenientMap{m, missing}
}

// Find returns the default for a key that is absent.
func (m lenientMap) Find(key ref.Val) (ref.Val, bool) {
	if v, ok := m.Mapper.Find(key); ok {
		return v, true
	}
	if _, ok := key.(types.String); ok {
		return m.missing, true
	}
	return nil, false
}

// Get is Find without the second result.
func (m lenientMap) Get(key ref.Val) ref.Val {
	if v, ok := m.Find(key); ok {
		return v
	}
	return m.Mapper.Get(key)
}

// program is a compiled expression.
type program struct {
	prog   cel.Program
	path   []string // of a plain reference such as matrix.go, else nil
	status bool     // a status function occurs in it
	late   bool     // it refers to what is known only once the job runs
}

// programCache keeps compiled expressions: at most two generations, the older
// one forgotten when the younger is full.
type programCache struct {
	mu         sync.Mutex
	young, old map[string]*program
}

const cacheGeneration = 512

var programs = programCache{young: map[string]*program{}}

func (c *programCache) get(expr string) (*program, error) {
	c.mu.Lock()
	p, ok := c.young[expr]
	if !ok {
		p, ok = c.old[expr]
	}
	c.mu.Unlock()
	if !ok {
		var err error
		if p, err = compile(expr); err != nil {
			return nil, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.young) >= cacheGeneration {
		c.old, c.young = c.young, map[string]*program{}
	}
	c.young[expr] = p
	return p, nil
}

func compile(expr string) (*program, error) {
	env := celEnv()
	parsed, iss := env.Parse(expr)
	if iss.Err() != nil {
		return nil, invalidExpr(expr, celMessage(iss.Errors()[0].Message))
	}
	checked, iss := env.Check(parsed)
	if iss.Err() != nil {
		return nil, invalidExpr(expr, celMessage(iss.Errors()[0].Message))
	}
	prog, err := env.Program(checked, cel.CostLimit(maxExprCost))
	if err != nil {
		return nil, invalidExpr(expr, err.Error())
	}
	p := &program{prog: prog}
	root := parsed.NativeRep().Expr()
	if path, ok := constPath(root); ok && len(path) > 1 && spelled(path[0]) {
		p.path = path
	}
	ast.PreOrderVisit(root, ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() == ast.IdentKind {
			switch e.AsIdent() {
			case statusVar:
				p.status = true
			case "needs", "steps", "env":
				p.late = true
			}
		}
	}))
	return p, nil
}

func invalidExpr(expr, msg string) error {
	return fmt.Errorf("%w: expression %q: %s", ErrInvalid, abbreviate(expr), msg)
}

func abbreviate(s string) string {
	if r := []rune(s); len(r) > 80 {
		return string(r[:79]) + "…"
	}
	return s
}
