package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

// mutation is one change to one file.
type mutation struct {
	id   int
	file string
	line int
	what string

	start, end int // in bytes of the file
	// with wraps the text of the node, in which other mutants are, so that it changes while the mutant is switched on.
	with func(id int, text string) string

	reached, killed bool
}

// mutate returns a file with all its mutants, numbered from first.
func mutate(p *packages.Package, file *ast.File, src []byte, first int) ([]byte, []*mutation) {
	f := finder{p: p, src: src, base: p.Fset.File(file.FileStart).Base(), imports: imported(file)}
	for _, d := range file.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil && fn.Name.Name != "String" {
			ast.Inspect(fn.Body, f.visit)
		}
	}
	// An outer mutation comes before those in it.
	slices.SortStableFunc(f.found, func(a, b *mutation) int {
		if a.start != b.start {
			return a.start - b.start
		}
		return b.end - a.end
	})
	for i, m := range f.found {
		m.id = first + i
		m.file, m.line = filepath.Base(p.Fset.Position(file.FileStart).Filename), f.line(m.start)
	}
	text, _ := render(src, 0, len(src), f.found)
	return []byte(text), f.found
}

// render returns src[start:end] with the mutations in it, and those that begin after end.
func render(src []byte, start, end int, list []*mutation) (string, []*mutation) {
	var out strings.Builder
	for len(list) > 0 && list[0].start < end {
		m := list[0]
		out.Write(src[start:m.start])
		var inner string
		inner, list = render(src, m.start, m.end, list[1:])
		out.WriteString(m.with(m.id, inner))
		start = m.end
	}
	out.Write(src[start:end])
	return out.String(), list
}

// imported are the packages that a file imports under their own names.
func imported(file *ast.File) map[string]bool {
	paths := map[string]bool{}
	for _, i := range file.Imports {
		if i.Name == nil {
			paths[strings.Trim(i.Path.Value, `"`)] = true
		}
	}
	return paths
}

// finder collects mutations.
type finder struct {
	p       *packages.Package
	src     []byte
	base    int
	imports map[string]bool
	found   []*mutation
}

func (f *finder) line(offset int) int { return 1 + strings.Count(string(f.src[:offset]), "\n") }

func (f *finder) offset(p token.Pos) int { return int(p) - f.base }

func (f *finder) text(n ast.Node) string { return string(f.src[f.offset(n.Pos()):f.offset(n.End())]) }

// others are the operators that take an operator's place.
var others = map[token.Token][]token.Token{
	token.EQL: {token.NEQ}, token.NEQ: {token.EQL},
	token.LSS: {token.LEQ, token.GEQ}, token.LEQ: {token.LSS, token.GTR},
	token.GTR: {token.GEQ, token.LEQ}, token.GEQ: {token.GTR, token.LSS},
	token.LAND: {token.LOR}, token.LOR: {token.LAND},
	token.ADD: {token.SUB}, token.SUB: {token.ADD}, token.MUL: {token.QUO}, token.QUO: {token.MUL},
}

func (f *finder) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.GenDecl:
		return n.Tok != token.CONST
	case *ast.BinaryExpr:
		f.operator(n)
	case *ast.UnaryExpr:
		if n.Op == token.NOT {
			f.negate(n, "without "+f.text(n)[:1])
		}
	case *ast.IfStmt:
		switch ast.Unparen(n.Cond).(type) {
		case *ast.BinaryExpr, *ast.UnaryExpr:
		default:
			f.negate(n.Cond, "if not "+f.text(n.Cond))
		}
	case *ast.ReturnStmt:
		for _, r := range n.Results {
			if id, ok := r.(*ast.Ident); ok && (id.Name == "true" || id.Name == "false") {
				f.negate(r, "return not "+id.Name)
			}
		}
	case *ast.BlockStmt:
		f.statements(n.List)
	case *ast.CaseClause:
		f.statements(n.Body)
	case *ast.CommClause:
		f.statements(n.Body)
	}
	return true
}

// operator adds the mutants of a binary expression.
func (f *finder) operator(e *ast.BinaryExpr) {
	tv := f.p.TypesInfo.Types[e]
	name, ok := f.typeName(tv.Type)
	basic, _ := tv.Type.Underlying().(*types.Basic)
	if tv.Value != nil || !ok || basic == nil || basic.Info()&types.IsString != 0 {
		return
	}
	for _, op := range others[e.Op] {
		if isNilCheck(e) && op != token.EQL && op != token.NEQ {
			continue
		}
		x, y := f.offset(e.OpPos), f.offset(e.OpPos)+len(e.Op.String())
		changed := string(f.src[f.offset(e.Pos()):x]) + op.String() + string(f.src[y:f.offset(e.End())])
		f.add(e, fmt.Sprintf("%s for %s in %s", op, e.Op, f.text(e)), func(id int, text string) string {
			return fmt.Sprintf("func() %s { if mutant(%d) { return %s }; return %s }()", name, id, changed, text)
		})
	}
}

func isNilCheck(e *ast.BinaryExpr) bool {
	id, ok := e.Y.(*ast.Ident)
	return ok && id.Name == "nil"
}

// typeName is how the file names a type; false where it cannot.
func (f *finder) typeName(t types.Type) (string, bool) {
	ok := true
	name := types.TypeString(types.Default(t), func(p *types.Package) string {
		if p == f.p.Types {
			return ""
		}
		ok = ok && f.imports[p.Path()]
		return p.Name()
	})
	return name, ok
}

// negate adds the mutant that turns a truth value round.
func (f *finder) negate(e ast.Expr, what string) {
	tv := f.p.TypesInfo.Types[e]
	if basic, ok := tv.Type.(*types.Basic); !ok || basic.Info()&types.IsBoolean == 0 {
		return
	}
	f.add(e, what, func(id int, text string) string { return fmt.Sprintf("((%s) != mutant(%d))", text, id) })
}

// statements adds the mutants that leave a statement out.
func (f *finder) statements(list []ast.Stmt) {
	for _, s := range list {
		switch s := s.(type) {
		case *ast.ExprStmt:
			if call, ok := s.X.(*ast.CallExpr); !ok || f.text(call.Fun) == "panic" {
				continue
			}
		case *ast.AssignStmt:
			if s.Tok == token.DEFINE {
				continue
			}
		case *ast.IncDecStmt:
		case *ast.BranchStmt:
			if s.Tok != token.CONTINUE && s.Tok != token.BREAK {
				continue
			}
		default:
			continue
		}
		f.add(s, "without "+f.text(s), func(id int, text string) string {
			return fmt.Sprintf("if !mutant(%d) { %s }", id, text)
		})
	}
}

func (f *finder) add(n ast.Node, what string, with func(int, string) string) {
	what = strings.Join(strings.Fields(what), " ")
	if len(what) > 90 {
		what = what[:90] + "…"
	}
	f.found = append(f.found, &mutation{start: f.offset(n.Pos()), end: f.offset(n.End()), what: what, with: with})
}
