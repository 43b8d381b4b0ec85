import { availableParallelism } from 'node:os';
import { defineConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/**
 * The tiers of `npm test`: unit, integration (the driver against the software device in its own process) and
 * judges (Scapy and tshark decide).
 *
 * Unit tests share processes and the modules in them: to load the package anew for each file takes longer than most files run.
 * `unit-process` has those that want a process for themselves: they choose the FFI provider before anything is loaded, or look
 * through all memory for keys.
 */
const PROCESS = ['test/**/*{koffi,ffi-rs}.test.ts', 'test/fallback/engines/wiping.test.ts'];
const COMMON = {
  // Generous: machines are slow, and busy with the other tests. Tests wait for what is to happen, not for a time.
  testTimeout: 60_000,
  hookTimeout: 60_000,
  pool: 'forks' as const,
  // Tests map and clear much memory, so V8 collects its garbage often: several threads for it get into each other's way.
  execArgv: ['--single-threaded-gc'],
};

/** In this order, so that nothing long is left for the end, when the other workers have nothing more to do. */
const PROJECTS = ['integration', 'judges', 'unit-process', 'unit'];

class LongestFirst extends BaseSequencer {
  /** Within a project by the times of the last run, or by size where there was none. */
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const sorted = await super.sort(files);
    const rank = ({ project }: TestSpecification): number => PROJECTS.indexOf(project.name);
    return sorted.sort((a, b) => rank(a) - rank(b));
  }
}

export default defineConfig({
  test: {
    // All cores; four at least, as many tests wait for another process.
    maxWorkers: Math.max(4, availableParallelism()),
    sequence: { sequencer: LongestFirst },
    // What was compiled once is not compiled again.
    experimental: { fsModuleCache: true },
    projects: [
      {
        test: {
          ...COMMON,
          name: 'unit',
          include: ['test/**/*.test.ts'],
          exclude: ['test/integration/**', 'test/judges/**', ...PROCESS],
          isolate: false,
        },
      },
      {
        test: {
          ...COMMON,
          name: 'unit-process',
          include: PROCESS,
        },
      },
      {
        test: {
          ...COMMON,
          name: 'integration',
          include: ['test/integration/**/*.test.ts'],
          isolate: false,
        },
      },
      {
        test: {
          ...COMMON,
          name: 'judges',
          include: ['test/judges/**/*.test.ts'],
          isolate: false,
          testTimeout: 120_000,
        },
      },
    ],
  },
});
