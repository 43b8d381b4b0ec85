/** The conformance report as the one document of `--json`. */
import type { ConformanceReport } from '../../src/conform/index.ts';
import { summarise } from './summary.ts';

export function jsonReport(report: ConformanceReport): Record<string, unknown> {
  return {
    device: report.device,
    checks: report.checks.map(({ id, section, level, title, verdict, detail }) => ({
      id,
      section,
      level,
      title,
      verdict,
      detail,
    })),
    summary: summarise(report.checks),
  };
}
