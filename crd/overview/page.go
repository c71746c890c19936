package overview

import (
	"maps"
	"slices"
	"strings"
	"unicode/utf8"
)

// colour is an SGR parameter of a terminal (ECMA-48, 8.3.117).
type colour string

const (
	none   colour = ""
	bold   colour = "1"
	red    colour = "31"
	green  colour = "32"
	yellow colour = "33"
)

func colourOf(state string) colour {
	switch state {
	case "Ready":
		return green
	case "Degraded", "Pending", "Leaving", "Deleting":
		return yellow
	}
	return red
}

// page is the text while it is being written.
type page struct {
	Screen
	text strings.Builder
}

func (p *page) line(s string) {
	p.text.WriteString(strings.TrimRight(s, " "))
	p.text.WriteByte('\n')
}

func (p *page) paint(c colour, s string) string {
	if !p.Colour || c == none {
		return s
	}
	return "\x1b[" + string(c) + "m" + s + "\x1b[0m"
}

// sentence writes a sentence and breaks its lines at the width of the screen.
func (p *page) sentence(indent, s string) {
	line := indent
	for i, word := range strings.Fields(s) {
		longer := len([]rune(line)) + 1 + len([]rune(word))
		if i > 0 && p.Width > 0 && longer > p.Width && strings.TrimSpace(line) != "" {
			p.line(line)
			line = indent + "  "
		} else if i > 0 {
			line += " "
		}
		line += word
	}
	p.line(line)
}

// cell is a cell of a table.
type cell struct {
	text   string
	colour colour
}

// plain returns cells without colour. An empty text becomes a dash.
func plain(texts ...string) []cell {
	cells := make([]cell, len(texts))
	for i, t := range texts {
		if t == "" {
			t = "-"
		}
		cells[i] = cell{text: t}
	}
	return cells
}

// table is a table with a headline, and sentences below some of its rows.
type table struct {
	head  []string
	spare []string // heads of the columns to drop on a narrow screen, in this order
	rows  [][]cell
	below map[int]string // sentences by the number of the row
}

func (t *table) row(cells []cell) {
	if t.below == nil {
		t.below = map[int]string{}
	}
	t.rows = append(t.rows, cells)
}

const (
	gap      = 2 // number of blanks between columns, and at the left
	minWidth = 8 // width below which no column is cut
)

// table writes a table, or nothing if it has no rows. If the table is wider than the screen, it drops spare columns and
// then cuts the widest ones.
func (p *page) table(t table) {
	if len(t.rows) == 0 {
		return
	}
	widths, total := t.widths()
	for _, head := range t.spare {
		if p.Width > 0 && total > p.Width {
			t.drop(slices.Index(t.head, head))
			widths, total = t.widths()
		}
	}
	for p.Width > 0 && total > p.Width {
		widest := slices.Index(widths, slices.Max(widths))
		if widths[widest] <= minWidth {
			break
		}
		widths[widest]--
		total--
	}
	p.row(widths, plain(t.head...))
	for i, r := range t.rows {
		p.row(widths, r)
		if s := t.below[i]; s != "" {
			p.sentence(strings.Repeat(" ", 2*gap), s)
		}
	}
}

// widths returns the widths of the columns and of the whole table.
func (t *table) widths() (widths []int, total int) {
	for i, h := range t.head {
		width := len(h)
		for _, r := range t.rows {
			width = max(width, utf8.RuneCountInString(r[i].text))
		}
		widths = append(widths, width)
		total += gap + width
	}
	return widths, total
}

// drop removes a column.
func (t *table) drop(column int) {
	t.head = slices.Delete(t.head, column, column+1)
	for i := range t.rows {
		t.rows[i] = slices.Delete(t.rows[i], column, column+1)
	}
}

func (p *page) row(widths []int, cells []cell) {
	var line strings.Builder
	for i, c := range cells {
		text := cut(c.text, widths[i])
		padding := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
		line.WriteString(strings.Repeat(" ", gap) + p.paint(c.colour, text) + padding)
	}
	p.line(line.String())
}

// cut shortens a text that is too long, and ends it with an ellipsis.
func cut(s string, width int) string {
	runes := []rune(s)
	if len(runes) <= width {
		return s
	}
	return string(runes[:width-1]) + "…"
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
