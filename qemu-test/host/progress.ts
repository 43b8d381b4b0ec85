/** One line on a terminal that says what several jobs are doing; nothing but finished jobs elsewhere. */
export interface Progress {
  /** Shows `state` behind the name of a job. */
  update(job: string, state: string): void;
  /** Prints a line that stays, and forgets the job. */
  finish(job: string, line: string): void;
  /** Clears the line. */
  close(): void;
}

export function openProgress(stream: NodeJS.WriteStream): Progress {
  const jobs = new Map<string, string>();
  const clear = stream.isTTY === true ? '\r\x1b[K' : '';
  const draw = () => {
    if (clear === '') return;
    const text = [...jobs].map(([job, state]) => `${job}: ${state}`).join(' · ');
    stream.write(clear + text.slice(0, (stream.columns ?? 80) - 1));
  };
  return {
    update(job, state) {
      jobs.set(job, state);
      draw();
    },
    finish(job, line) {
      jobs.delete(job);
      stream.write(`${clear}${line}\n`);
      draw();
    },
    close() {
      stream.write(clear);
    },
  };
}
