//! Aligned text: a header, rows, two spaces between columns, no line drawing, so that `grep` and `awk` work on it.

use super::visible;

/// A table that is printed when complete.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    indent: usize,
}

impl Table {
    /// A table with these column titles.
    pub(crate) fn new<const N: usize>(titles: [&str; N]) -> Self {
        Self { rows: vec![titles.iter().map(ToString::to_string).collect()], indent: 0 }
    }

    /// A list of names and values without a header, indented.
    pub(crate) fn fields() -> Self {
        Self { rows: Vec::new(), indent: 2 }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| visible(cell)).collect());
    }

    /// Adds a name and its value.
    pub(crate) fn field(&mut self, name: &str, value: impl ToString) {
        self.row([name.to_owned(), value.to_string()]);
    }

    /// The text, each line ended.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |at: usize| self.rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|at| width(at).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(self.indent);
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let mut table = Table::new(["NODE", "UP"]);
        table.row(["n1-long-name".into(), "yes".into()]);
        table.row(["n2".into(), String::new()]);
        assert_eq!(table.render(), "NODE          UP\nn1-long-name  yes\nn2\n");
    }
}
